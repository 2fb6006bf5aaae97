//! Bytes, rates and times as people read them.

use std::time::Duration;

use engine::units::Length;

/// `512 B`, `4.0 GiB`, `931 MiB`: as the engine's own messages have it.
pub(crate) fn bytes(count: u64) -> String {
    Length(count).to_string()
}

/// `931 MiB/s`.
pub(crate) fn rate(bytes_a_second: u64) -> String {
    format!("{}/s", bytes(bytes_a_second))
}

/// `0.02 s`, `4.4 s`, `2 min 5 s`, `3 h 12 min`, `4 d 7 h`.
pub(crate) fn span(time: Duration) -> String {
    let hundredths = time.as_millis() / 10;
    let seconds = time.as_secs();
    match seconds {
        0 => format!("0.{hundredths:02} s"),
        1..60 => format!("{}.{} s", seconds, time.subsec_millis() / 100),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// Bytes a second over `time`; 0 where no time has passed.
pub(crate) fn average(count: u64, time: Duration) -> u64 {
    let per_second = u128::from(count) * 1_000_000_000;
    u64::try_from(per_second.checked_div(time.as_nanos()).unwrap_or(0)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_people_read_them() {
        for (milliseconds, text) in [
            (0, "0.00 s"),
            (20, "0.02 s"),
            (4_449, "4.4 s"),
            (59_999, "59.9 s"),
            (125_000, "2 min 5 s"),
            (11_520_000, "3 h 12 min"),
            (370_800_000, "4 d 7 h"),
        ] {
            assert_eq!(span(Duration::from_millis(milliseconds)), text);
        }
    }

    #[test]
    fn average_of_no_time_is_none() {
        assert_eq!(average(1000, Duration::ZERO), 0);
        assert_eq!(average(1000, Duration::from_millis(500)), 2000);
    }
}
