//! What plots are drawn with: scales, axes and paths. By hand, since colours must follow the reader's light or dark theme, which
//! they do only as classes of the page's own style sheet.

use std::fmt::Write as _;

use portcullis_engine::Timestamp;

/// Width of every plot; the page scales it.
pub(super) const WIDTH: f64 = 1060.0;

/// Text that is safe between tags and in attributes.
pub(super) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            // No text of a page holds them, and some turn the direction of reading around.
            c if c.is_control()
                || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') =>
            {
                safe.push('\u{fffd}');
            }
            c => safe.push(c),
        }
    }
    safe
}

/// Time from left to right.
#[derive(Clone, Copy, Debug)]
pub(super) struct TimeAxis {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) left: f64,
    pub(super) right: f64,
}

impl TimeAxis {
    /// Where a second is.
    pub(super) fn x(&self, second: u64) -> f64 {
        let second = second.clamp(self.from, self.to);
        let share = (second - self.from) as f64 / (self.to - self.from).max(1) as f64;
        self.left + share * (self.right - self.left)
    }

    /// Lines and labels, for a plot between two heights. Where the day changes, the day stands under the time.
    pub(super) fn draw(&self, top: f64, bottom: f64, to: &mut String) {
        let step = step(self.to - self.from);
        let mut day = String::new();
        let mut second = self.from.div_ceil(step) * step;
        while second <= self.to {
            let x = self.x(second);
            let text = Timestamp::from_secs(second).to_string();
            let (date, time) = (text.get(..10).unwrap_or(""), text.get(11..16).unwrap_or(""));
            let _ = write!(
                to,
                r#"<line class="grid" x1="{x:.1}" x2="{x:.1}" y1="{top}" y2="{bottom}"/>"#
            );
            if step < 86_400 {
                let y = bottom + 16.0;
                let _ = write!(to, r#"<text class="mid" x="{x:.1}" y="{y}">{time}</text>"#);
            }
            if day != date {
                let y = bottom + if step < 86_400 { 31.0 } else { 16.0 };
                let _ = write!(to, r#"<text class="mid" x="{x:.1}" y="{y}">{date}</text>"#);
                date.clone_into(&mut day);
            }
            second += step;
        }
    }
}

/// Seconds between labels.
fn step(span: u64) -> u64 {
    const STEPS: [u64; 19] = [
        1, 5, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400,
        172_800, 604_800, 2_592_000,
    ];
    let wide_enough = |step: &u64| span / step <= 10;
    STEPS
        .into_iter()
        .find(wide_enough)
        .unwrap_or_else(|| (span / 10).next_multiple_of(86_400))
}

/// Rates from bottom to top, in requests a second.
#[derive(Clone, Copy, Debug)]
pub(super) struct RateAxis {
    highest: f64,
    /// A flood and what is normal both have to be seen.
    pub(super) is_log: bool,
    pub(super) top: f64,
    pub(super) bottom: f64,
}

impl RateAxis {
    /// For rates up to `highest`, most of which are about `usual`.
    pub(super) fn new(highest: f64, usual: f64, top: f64, bottom: f64) -> Self {
        let highest = highest.max(0.1);
        Self {
            highest,
            is_log: highest > 12.0 * usual.max(0.5),
            top,
            bottom,
        }
    }

    /// Where a rate is.
    pub(super) fn y(&self, rate: f64) -> f64 {
        let rate = rate.clamp(0.0, self.highest * 1.05);
        let share = if self.is_log {
            rate.ln_1p() / (self.highest * 1.05).ln_1p()
        } else {
            rate / (self.highest * 1.05)
        };
        self.bottom - share * (self.bottom - self.top)
    }

    fn ticks(&self) -> Vec<f64> {
        let mut ticks = vec![0.0];
        if self.is_log {
            let mut decade = 1.0;
            while decade <= self.highest {
                ticks.push(decade);
                if self.highest < 100.0 && 3.0 * decade <= self.highest {
                    ticks.push(3.0 * decade);
                }
                decade *= 10.0;
            }
            return ticks;
        }
        let rough = self.highest / 4.0;
        let decade = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .map(|times| times * decade)
            .into_iter()
            .find(|step| *step >= rough)
            .unwrap_or(rough);
        for n in 1..=5 {
            ticks.push(step * f64::from(n));
        }
        ticks.retain(|tick| *tick <= self.highest * 1.05);
        ticks
    }

    /// Lines and labels.
    pub(super) fn draw(&self, time: &TimeAxis, to: &mut String) {
        let (left, right) = (time.left, time.right);
        for tick in self.ticks() {
            let y = self.y(tick);
            let label = rate(tick);
            let (x, text_y) = (left - 8.0, y + 4.0);
            let _ = write!(
                to,
                r#"<line class="grid" x1="{left}" x2="{right}" y1="{y:.1}" y2="{y:.1}"/><text class="end" x="{x}" y="{text_y:.1}">{label}</text>"#
            );
        }
        let words = if self.is_log {
            "requests a second, logarithmic"
        } else {
            "requests a second"
        };
        let y = self.top - 10.0;
        let _ = write!(to, r#"<text x="4" y="{y}">{words}</text>"#);
    }
}

/// A rate in as few figures as tell something.
pub(super) fn rate(rate: f64) -> String {
    if rate == 0.0 {
        "0".to_owned()
    } else if rate >= 10.0 {
        count(rate.round())
    } else if rate >= 1.0 {
        let text = format!("{rate:.1}");
        text.strip_suffix(".0").unwrap_or(&text).to_owned()
    } else {
        format!("{rate:.2}")
    }
}

/// A whole number with its thousands apart.
pub(super) fn count(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut apart = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            apart.push(',');
        }
        apart.push(digit);
    }
    apart
}

/// A line through steps: each rate holds for its stretch of time. `None` leaves a gap.
pub(super) fn steps(
    points: impl Iterator<Item = (u64, Option<f64>)>,
    width: u64,
    time: &TimeAxis,
    rates: &RateAxis,
) -> String {
    let mut path = String::new();
    let mut pen = false;
    for (second, rate) in points {
        let Some(rate) = rate else {
            pen = false;
            continue;
        };
        let (from, to, y) = (time.x(second), time.x(second + width), rates.y(rate));
        let verb = if pen { 'L' } else { 'M' };
        let _ = write!(path, "{verb}{from:.1} {y:.1}H{to:.1}");
        pen = true;
    }
    path
}

/// The surface between two lines of steps.
pub(super) fn band(
    points: impl Iterator<Item = (u64, Option<(f64, f64)>)>,
    width: u64,
    time: &TimeAxis,
    rates: &RateAxis,
) -> String {
    let mut path = String::new();
    let mut back = String::new();
    for (second, pair) in points {
        let Some((low, high)) = pair else {
            close(&mut path, &mut back);
            continue;
        };
        let (from, to) = (time.x(second), time.x(second + width));
        let (low, high) = (rates.y(low), rates.y(high));
        let verb = if back.is_empty() { 'M' } else { 'L' };
        let _ = write!(path, "{verb}{from:.1} {high:.1}H{to:.1}");
        back.insert_str(0, &format!("L{to:.1} {low:.1}H{from:.1}"));
    }
    close(&mut path, &mut back);
    path
}

fn close(path: &mut String, back: &mut String) {
    if !back.is_empty() {
        path.push_str(back);
        path.push('Z');
        back.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_becomes_markup() {
        assert_eq!(
            escaped("<script>'\"&\u{202e}\x1b[1m"),
            "&lt;script&gt;&#39;&quot;&amp;\u{fffd}\u{fffd}[1m"
        );
    }

    #[test]
    fn numbers_are_short() {
        for (number, text) in [
            (0.0, "0"),
            (0.05, "0.05"),
            (2.0, "2"),
            (2.54, "2.5"),
            (25.4, "25"),
            (1000.0, "1,000"),
            (12_345_678.0, "12,345,678"),
        ] {
            assert_eq!(rate(number), text);
        }
    }

    #[test]
    fn both_axes_stay_within_the_plot() {
        for (highest, usual) in [
            (0.0, 0.0),
            (0.3, 0.1),
            (7.0, 5.0),
            (90.0, 2.0),
            (50_000.0, 5.0),
        ] {
            let rates = RateAxis::new(highest, usual, 20.0, 300.0);
            let ticks = rates.ticks();
            assert!((2..9).contains(&ticks.len()), "{highest}: {ticks:?}");
            for rate in ticks.into_iter().chain([highest]) {
                assert!((20.0..=300.0).contains(&rates.y(rate)), "{highest}: {rate}");
            }
        }
        for span in [
            0,
            1,
            59,
            3600,
            86_400,
            7 * 86_400,
            400 * 86_400,
            u64::from(u32::MAX),
        ] {
            let time = TimeAxis {
                from: 1_700_000_000,
                to: 1_700_000_000 + span,
                left: 50.0,
                right: 1000.0,
            };
            let mut drawn = String::new();
            time.draw(0.0, 100.0, &mut drawn);
            assert!(drawn.matches("<line").count() <= 12, "{span}");
            assert_eq!(time.x(0), 50.0);
        }
    }
}
