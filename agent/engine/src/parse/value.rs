//! Times, addresses and statuses, each in every way that Nginx writes it.

use std::net::{IpAddr, Ipv4Addr};

use jiff::{civil::DateTime, tz::Offset};

use crate::time::Timestamp;

/// `$msec`, `$time_local` or `$time_iso8601`.
pub(super) fn time(text: &[u8]) -> Option<Timestamp> {
    epoch(text).or_else(|| {
        let time = local(text).or_else(|| str::from_utf8(text).ok()?.parse().ok())?;
        let millis = u64::try_from(time.as_millisecond()).ok()?;
        Some(Timestamp::from_millis(millis))
    })
}

/// Epoch seconds, with at most three digits of a fraction. Every such number is exact in milliseconds, as it is when it goes
/// through a floating-point number.
pub(super) fn epoch(text: &[u8]) -> Option<Timestamp> {
    // Far below the end of time.
    (text.len() <= 14).then_some(())?;
    let (mut number, mut whole, mut fraction) = (0_u64, 0, None);
    for byte in text {
        match (byte, &mut fraction) {
            (b'0'..=b'9', places) => {
                number = number * 10 + u64::from(byte - b'0');
                *places.as_mut().unwrap_or(&mut whole) += 1;
            }
            (b'.', None) => fraction = Some(0),
            _ => return None,
        }
    }
    let millis = match (whole, fraction) {
        (1..=10, None) => number * 1000,
        (1..=10, Some(1)) => number * 100,
        (1..=10, Some(2)) => number * 10,
        (1..=10, Some(3)) => number,
        _ => return None,
    };
    Some(Timestamp::from_millis(millis))
}

/// `22/Nov/2026:18:11:06 +0000`
fn local(text: &[u8]) -> Option<jiff::Timestamp> {
    const MONTHS: &[u8; 36] = b"JanFebMarAprMayJunJulAugSepOctNovDec";
    let text: &[u8; 26] = text.try_into().ok()?;
    let between = [2, 6, 11, 14, 17, 20].map(|at| text[at]);
    (between == *b"//::: ").then_some(())?;
    let number = |at: usize| i8::try_from(digits(&text[at..at + 2])?).ok();
    let month = MONTHS
        .as_chunks::<3>()
        .0
        .iter()
        .zip(1..)
        .find_map(|(month, number)| (*month == text[3..6]).then_some(number))?;
    let year = i16::try_from(digits(&text[7..11])?).ok()?;
    let ahead = i32::from(number(22)?) * 3600 + i32::from(number(24)?) * 60;
    let ahead = match text[21] {
        b'+' => ahead,
        b'-' => -ahead,
        _ => return None,
    };
    let (hour, minute, second) = (number(12)?, number(15)?, number(18)?);
    let time = DateTime::new(year, month, number(0)?, hour, minute, second, 0).ok()?;
    Offset::from_seconds(ahead).ok()?.to_timestamp(time).ok()
}

/// Something else stands where an address should.
pub(super) struct NoAddress;

/// The address of a connection; none where Nginx writes that there is no value. What comes in by a Unix socket comes from this
/// host.
pub(super) fn peer(text: &[u8]) -> Result<Option<IpAddr>, NoAddress> {
    match text {
        b"" | b"-" => Ok(None),
        b"unix:" => Ok(Some(Ipv4Addr::LOCALHOST.into())),
        text => address(text).map(Some).ok_or(NoAddress),
    }
}

/// An address; one that is mapped into IPv6 is IPv4.
pub(super) fn address(text: &[u8]) -> Option<IpAddr> {
    if let Some(address) = dotted(text) {
        return Some(address.into());
    }
    let address: IpAddr = str::from_utf8(text).ok()?.parse().ok()?;
    Some(address.to_canonical())
}

/// Four numbers up to 255, without leading zeros.
fn dotted(text: &[u8]) -> Option<Ipv4Addr> {
    let mut octets = [0u8; 4];
    let (mut place, mut digits) = (0, 0);
    for byte in text {
        let octet = octets.get_mut(place)?;
        match byte {
            b'0'..=b'9' if digits == 0 || *octet > 0 => {
                *octet = octet.checked_mul(10)?.checked_add(byte - b'0')?;
                digits += 1;
            }
            b'.' if digits > 0 => (place, digits) = (place + 1, 0),
            _ => return None,
        }
    }
    (place == 3 && digits > 0).then(|| octets.into())
}

/// One to three digits.
pub(super) fn status(text: &[u8]) -> Option<u16> {
    (text.len() <= 3).then_some(())?;
    u16::try_from(digits(text)?).ok()
}

/// A number of at least one digit and few enough of them.
fn digits(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0, |number, byte| {
        byte.is_ascii_digit()
            .then(|| number * 10 + u64::from(byte - b'0'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_read_in_each_of_its_three_forms() {
        let expected = Timestamp::from_millis(1_795_371_066_000);
        for text in [
            "1795371066",
            "1795371066.0",
            "22/Nov/2026:18:11:06 +0000",
            "22/Nov/2026:10:41:06 -0730",
            "23/Nov/2026:00:11:06 +0600",
            "2026-11-22T18:11:06+00:00",
            "2026-11-22T19:11:06.000+01:00",
            "2026-11-22T18:11:06Z",
        ] {
            assert_eq!(time(text.as_bytes()), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_none() {
        for text in [
            "",
            "-",
            "now",
            "22/Nov/2026:18:11:06",
            "22/Nov/2026:18:11:06 0000",
            "22/Nov/2026:18:11:06 +000",
            "22/nov/2026:18:11:06 +0000",
            "22/ovD/2026:18:11:06 +0000",
            "31/Nov/2026:18:11:06 +0000",
            "22/Nov/2026:24:11:06 +0000",
            "22/Nov/2026:18:11:61 +0000",
            "22/Nov/2026:18:11:06 +9900",
            "22/Nov/1969:18:11:06 +0000",
            "22/Nov/20 6:18:11:06 +0000",
            "22/Nov/2026:+8:11:06 +0000",
        ] {
            assert_eq!(time(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn an_ipv4_address_is_what_the_standard_library_takes_for_one() {
        for text in [
            "0.0.0.0",
            "255.255.255.255",
            "192.0.2.1",
            "01.2.3.4",
            "1.2.3.04",
            "00.0.0.0",
            "1.2.3",
            "1.2.3.4.5",
            "1..2.3",
            ".1.2.3.4",
            "1.2.3.4.",
            "256.1.1.1",
            "1.1.1.999",
            "1.1.1.1 ",
            "",
            "1",
            "a.b.c.d",
            "1.2.3.-4",
        ] {
            assert_eq!(dotted(text.as_bytes()), text.parse().ok(), "{text}");
        }
    }
}
