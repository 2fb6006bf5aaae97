//! Finding zeros.

/// Bytes looked at in one step of the loop: wide enough for the compiler to use vector registers.
const STEP: usize = 128;

/// Whether all bytes are zero. Data is told apart by its first bytes, nearly always; only zeros are read whole.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut steps = bytes.chunks_exact(STEP);
    for step in &mut steps {
        let mut any = 0u64;
        for word in step.chunks_exact(8) {
            any |= u64::from_ne_bytes(word.try_into().expect("eight bytes"));
        }
        if any != 0 {
            return false;
        }
    }
    steps.remainder().iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn one_byte_anywhere_is_found() {
        for length in [0, 1, 7, 8, 127, 128, 129, 300, 4096] {
            let mut bytes = vec![0u8; length];
            assert!(is_zero(&bytes), "{length}");
            for at in 0..length {
                bytes[at] = 1 << (at % 8);
                assert!(!is_zero(&bytes), "{at} of {length}");
                bytes[at] = 0;
            }
        }
    }
}
