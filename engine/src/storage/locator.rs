//! What a user writes on the command line for a disk, a size or a speed.
//!
//! Pure text to typed values; nothing is opened here. What is recognised but not supported by this version is refused by
//! name, so that `nbds://host/x` never ends as "no such file". A path that looks like something else is written with `./`
//! in front.

use std::fmt;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, Operation, Refusal, Result};
use crate::nbd::client::NbdUri;
use crate::nbd::client::uri::is_nbd;
use crate::units::{ClusterSize, Length, MAX_LENGTH, Speed};

/// Where a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locator {
    text: String,
    place: Place,
}

/// The kinds of place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A regular file or a block device.
    Path(PathBuf),
    /// `null:` or `null:SIZE`: reads give nothing in particular, writes vanish.
    Null {
        /// Length, where one was given.
        length: Option<Length>,
    },
    /// An export of an NBD server.
    Nbd(NbdUri),
}

impl Locator {
    /// Understands a path, `null:` or `null:SIZE`, and URIs of NBD.
    ///
    /// # Errors
    /// A refusal for an empty text, a bad size, a spoilt URI, and every other scheme.
    pub fn parse(text: &str) -> Result<Self> {
        let refused = |refusal, reason: &'static str, advice: &'static str| {
            Err(Error::refused(refusal, Operation::Parse, format!("'{text}'"), reason).advise(advice))
        };
        if text.is_empty() {
            return refused(
                Refusal::BadArgument,
                "the name of a disk is empty",
                "name a file or a block device",
            );
        }
        if text.contains('\0') {
            return refused(Refusal::BadArgument, "a path holds no zero byte", "check the path");
        }
        if let Some(size) = text.strip_prefix("null:") {
            let length = if size.is_empty() { None } else { Some(null_length(text, size)?) };
            return Ok(Self { text: text.to_owned(), place: Place::Null { length } });
        }
        match scheme(text) {
            Some(scheme) if is_nbd(scheme) => match NbdUri::parse(text) {
                Ok(uri) => Ok(Self { text: text.to_owned(), place: Place::Nbd(uri) }),
                Err((refusal, reason, advice)) => refused(refusal, reason, advice),
            },
            Some(_) => refused(
                Refusal::Unsupported,
                "this kind of address is not supported by this version",
                "for a file of that name put ./ in front of it",
            ),
            None => Ok(Self { text: text.to_owned(), place: Place::Path(PathBuf::from(text)) }),
        }
    }

    /// The locator of a path, whatever it looks like.
    #[must_use]
    pub fn path(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        Self { text: path.to_string_lossy().into_owned(), place: Place::Path(path.to_owned()) }
    }

    /// As the user wrote it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Where it points.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }
}

impl fmt::Display for Locator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Locator {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

/// `SCHEME` where `text` begins with `SCHEME://`.
fn scheme(text: &str) -> Option<&str> {
    let (scheme, _) = text.split_once("://")?;
    let valid = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'));
    valid.then_some(scheme)
}

/// The size of `null:SIZE`, refused by the whole argument: a user looks for what was written.
fn null_length(text: &str, size: &str) -> Result<Length> {
    quantity(size).map(Length).map_err(|(refusal, reason)| {
        Error::refused(refusal, Operation::Parse, format!("the size in '{text}'"), reason)
            .advise("write it like null:65536, null:64K or null:1.5G")
    })
}

/// A size as users write it: `4096`, `64K`, `1.5G`, `10GiB`; powers of 1024; a fraction must give whole bytes.
///
/// # Errors
/// A refusal for what is no size, and for one beyond [`MAX_LENGTH`].
pub fn parse_size(text: &str) -> Result<Length> {
    quantity(text).map(Length).map_err(|(refusal, reason)| {
        Error::refused(refusal, Operation::Parse, format!("size '{text}'"), reason)
            .advise("write it like 65536, 64K, 1.5G or 2TiB")
    })
}

/// A speed as users write it: a size a second, `200M` or `200M/s`; not 0.
///
/// # Errors
/// A refusal for what is no speed.
pub fn parse_speed(text: &str) -> Result<Speed> {
    let refused = |refusal, reason| {
        Error::refused(refusal, Operation::Parse, format!("speed '{text}'"), reason)
            .advise("write bytes a second like 500K, 200M or 1.5G; leave the option out for no limit")
    };
    let bytes = quantity(text.strip_suffix("/s").unwrap_or(text))
        .map_err(|(refusal, reason)| refused(refusal, reason))?;
    NonZeroU64::new(bytes).map(Speed).ok_or_else(|| refused(Refusal::BadArgument, "a speed of 0 never ends"))
}

/// A cluster size as users write it.
///
/// # Errors
/// A refusal unless it is a power of two from 4 KiB to 4 MiB.
pub fn parse_cluster_size(text: &str) -> Result<ClusterSize> {
    let refused = |refusal, reason| {
        Error::refused(refusal, Operation::Parse, format!("cluster size '{text}'"), reason)
            .advise("use a power of two from 4K to 4M, like 64K")
    };
    let bytes = quantity(text).map_err(|(refusal, reason)| refused(refusal, reason))?;
    let reason = if bytes.is_power_of_two() { "it is out of range" } else { "it is no power of two" };
    ClusterSize::new(bytes).ok_or_else(|| refused(Refusal::BadArgument, reason))
}

/// Most digits of a number, before and after the point together; more cannot matter below [`MAX_LENGTH`].
const MAX_DIGITS: usize = 30;

type NotAQuantity = (Refusal, &'static str);

fn quantity(text: &str) -> std::result::Result<u64, NotAQuantity> {
    let bad = |reason| Err((Refusal::BadArgument, reason));
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = match number.split_once('.') {
        Some((_, "")) => return bad("there is no digit after the point"),
        Some((whole, fraction)) => (whole, fraction),
        None => (number, ""),
    };
    if text.starts_with('-') {
        return bad("it is negative");
    }
    if whole.is_empty() {
        return bad("it does not begin with a digit");
    }
    if fraction.contains('.') {
        return bad("it has two points");
    }
    if whole.len() + fraction.len() > MAX_DIGITS {
        return Err((Refusal::TooLarge, "it has too many digits"));
    }
    let Some(shift) = unit_shift(suffix) else {
        return bad("its unit is none of B, K, M, G, T, P, E (or KiB, MiB, …, all powers of 1024)");
    };
    let too_large: NotAQuantity = (Refusal::TooLarge, "it is larger than any disk that can be copied");
    // At most 30 digits fit in 128 bits, but shifted by up to 60 bits they may not.
    let digits: u128 = format!("{whole}{fraction}").parse().map_err(|_| too_large)?;
    let scaled = digits.checked_mul(1 << shift).ok_or(too_large)?;
    let divisor = 10_u128.pow(u32::try_from(fraction.len()).map_err(|_| too_large)?);
    if !scaled.is_multiple_of(divisor) {
        return bad("the fraction does not give whole bytes");
    }
    u64::try_from(scaled / divisor).ok().filter(|&bytes| bytes <= MAX_LENGTH).ok_or(too_large)
}

fn unit_shift(suffix: &str) -> Option<u32> {
    let letter = match suffix.len() {
        0 => return Some(0),
        1 => suffix,
        3 if suffix.get(1..)?.eq_ignore_ascii_case("ib") => suffix.get(..1)?,
        _ => return None,
    };
    let units = ["b", "k", "m", "g", "t", "p", "e"];
    let place = units.iter().position(|unit| letter.eq_ignore_ascii_case(unit))?;
    if place == 0 && suffix.len() == 3 {
        return None;
    }
    u32::try_from(place * 10).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::ErrorKind;

    fn refusal_of<T: fmt::Debug>(result: Result<T>) -> Refusal {
        match result.expect_err("refused").kind() {
            ErrorKind::Refused(refusal) => refusal,
            other => panic!("not a refusal: {other:?}"),
        }
    }

    #[test]
    fn locators() {
        let path = |text: &str| Locator::parse(text).expect("a path").place().clone();
        assert_eq!(path("disk.img"), Place::Path("disk.img".into()));
        assert_eq!(path("./nbd://x"), Place::Path("./nbd://x".into()));
        assert_eq!(path("./null:"), Place::Path("./null:".into()));
        assert_eq!(path("/dev/disk/by-id/a:b"), Place::Path("/dev/disk/by-id/a:b".into()));
        assert_eq!(path("null:"), Place::Null { length: None });
        assert_eq!(path("null:64G"), Place::Null { length: Some(Length(64 << 30)) });
        assert!(matches!(path("nbd://host/x"), Place::Nbd(uri) if uri.export == "x"));
        assert!(matches!(path("nbd+unix:///?socket=/s"), Place::Nbd(uri) if uri.export.is_empty()));
        for tls in ["nbds://h", "nbds+unix:///x?socket=/s"] {
            let error = Locator::parse(tls).expect_err("refused");
            assert!(error.to_string().contains("NBD over TLS is not supported by this version"), "{error}");
        }
        assert_eq!(refusal_of(Locator::parse("nbd://h/x?y")), Refusal::BadArgument);
        assert_eq!(refusal_of(Locator::parse("http://host/x")), Refusal::Unsupported);
        assert_eq!(refusal_of(Locator::parse("")), Refusal::BadArgument);
        assert_eq!(refusal_of(Locator::parse("a\0b")), Refusal::BadArgument);
        assert_eq!(refusal_of(Locator::parse("null:-1")), Refusal::BadArgument);
        let error = Locator::parse("null:0x").expect_err("refused").to_string();
        assert!(error.starts_with("cannot understand the size in 'null:0x': "), "{error}");
    }

    #[test]
    fn sizes() {
        let good: [(&str, u64); 10] = [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("64K", 65536),
            ("64k", 65536),
            ("64KiB", 65536),
            ("1.5G", 3 << 29),
            ("0.5K", 512),
            ("2T", 2 << 40),
            ("7E", 7 << 60),
        ];
        for (text, bytes) in good {
            assert_eq!(parse_size(text).expect(text), Length(bytes), "{text}");
        }
        for text in [
            "", "K", "-1", "+1", "1.", ".5K", "1.5", "0.3K", "1..5K", "1.5.5K", "64KB", "64X", "1 K", "BiB",
            "1BiB", "0x10", "1e3", "６４K", "NaN",
        ] {
            assert_eq!(refusal_of(parse_size(text)), Refusal::BadArgument, "{text}");
        }
        for text in ["8E", "9223372036854775807", "99999999999999999999", "1234567890123456789012345678901"] {
            assert_eq!(refusal_of(parse_size(text)), Refusal::TooLarge, "{text}");
        }
    }

    #[test]
    fn speeds_and_clusters() {
        assert_eq!(parse_speed("200M").expect("speed").0.get(), 200 << 20);
        assert_eq!(parse_speed("1.5M/s").expect("speed").0.get(), 3 << 19);
        assert_eq!(refusal_of(parse_speed("0")), Refusal::BadArgument);
        assert_eq!(refusal_of(parse_speed("fast")), Refusal::BadArgument);
        assert_eq!(parse_cluster_size("64K").expect("cluster"), ClusterSize::DEFAULT);
        for text in ["0", "2K", "8M", "65K", "96K"] {
            assert_eq!(refusal_of(parse_cluster_size(text)), Refusal::BadArgument, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,40}") {
            drop((parse_size(&text), parse_speed(&text), parse_cluster_size(&text), Locator::parse(&text)));
        }

        #[test]
        fn near_sizes_never_panic(text in "-?[0-9]{0,32}\\.?[0-9]{0,10}[bkmgtpexBKMGTPE]?(iB)?") {
            drop((parse_size(&text), parse_speed(&text), parse_cluster_size(&text)));
        }

        #[test]
        fn whole_numbers_come_back(bytes in 0..=MAX_LENGTH) {
            prop_assert_eq!(parse_size(&bytes.to_string()).expect("a size"), Length(bytes));
        }

        #[test]
        fn units_are_powers_of_1024(count in 0_u64..1 << 12, unit in 0_usize..5) {
            let text = format!("{count}{}", ["", "K", "M", "G", "T"][unit]);
            prop_assert_eq!(parse_size(&text).expect("a size"), Length(count << (10 * unit)));
        }

        #[test]
        fn binary_fractions_are_exact(whole in 0_u64..1000, quarters in 0_u64..4) {
            let text = format!("{whole}.{:02}M", quarters * 25);
            prop_assert_eq!(parse_size(&text).expect("a size"), Length((whole << 20) + (quarters << 18)));
        }
    }
}
