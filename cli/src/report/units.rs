//! Bytes, rates and times as people read them. Powers of 1024, two significant places at least, no false precision.

use std::time::Duration;

/// `512 B`, `4.0 GiB`, `931 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    // Tenths of a unit, rounded to nearest, so that 1023.96 KiB moves on to 1.0 MiB.
    let mut place = 0;
    let mut tenths = u128::from(count) * 10;
    while place + 1 < UNITS.len() && (tenths + (1 << (10 * place)) / 2) >> (10 * place) >= 10_240 {
        place += 1;
    }
    if place == 0 {
        return format!("{count} B");
    }
    tenths = (tenths + (1 << (10 * place)) / 2) >> (10 * place);
    if tenths >= 1000 {
        format!("{} {}", (tenths + 5) / 10, UNITS[place])
    } else {
        format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[place])
    }
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
    fn bytes_as_people_read_them() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (65536, "64.0 KiB"),
            (931 << 20, "931 MiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (4 << 30, "4.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

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
