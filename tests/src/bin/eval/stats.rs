//! Medians and intervals of confidence.

/// The value that a share `q` of all does not exceed (nearest rank); what never happened counts as longer than anything.
/// `None`: it never happens, or there are none.
pub fn quantile(all: &[Option<u64>], q: f64) -> Option<u64> {
    let mut sorted: Vec<u64> = all.iter().map(|one| one.unwrap_or(u64::MAX)).collect();
    sorted.sort_unstable();
    let rank = rank(q, sorted.len());
    sorted.get(rank).copied().filter(|value| *value != u64::MAX)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "between 0 and a length"
)]
fn rank(q: f64, count: usize) -> usize {
    ((q * count as f64).ceil() as usize).saturating_sub(1)
}

/// The share of all that happened within a time.
pub fn share_within(all: &[Option<u64>], time: u64) -> f64 {
    let within = all.iter().flatten().filter(|one| **one <= time).count();
    within as f64 / all.len().max(1) as f64
}

/// In what range the true share lies, with 95 % confidence, when `hits` of `tries` were seen: Clopper and Pearson's, and
/// with none seen the rule of three.
pub fn confidence(hits: u64, tries: u64) -> (f64, f64) {
    if tries == 0 {
        return (0.0, 1.0);
    }
    let (k, n) = (hits as f64, tries as f64);
    if hits == 0 {
        return (0.0, (3.0 / n).min(1.0));
    }
    // P(at least k | p) is I_p(k, n − k + 1), which rises with p.
    let lower = root(|p| beta(p, k, n - k + 1.0) - 0.025);
    let upper = if hits >= tries {
        1.0
    } else {
        root(|p| beta(p, k + 1.0, n - k) - 0.975)
    };
    (lower, upper)
}

/// Where a rising function crosses zero between 0 and 1. Halved geometrically where it is tiny: shares are millionths.
fn root(f: impl Fn(f64) -> f64) -> f64 {
    let (mut low, mut high) = (1e-15_f64, 1.0_f64);
    for _ in 0..200 {
        let middle = if high > 4.0 * low {
            (low * high).sqrt()
        } else {
            f64::midpoint(low, high)
        };
        if f(middle) < 0.0 {
            low = middle;
        } else {
            high = middle;
        }
    }
    high
}

/// The regularised incomplete beta function of x, by its continued fraction (Lentz).
fn beta(x: f64, one: f64, other: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    if x >= 1.0 {
        return 1.0;
    }
    let both = one + other;
    // The fraction converges quickly on this side only.
    if x > (one + 1.0) / (both + 2.0) {
        return 1.0 - beta(1.0 - x, other, one);
    }
    let front =
        one * x.ln() + other * (-x).ln_1p() + ln_gamma(both) - ln_gamma(one) - ln_gamma(other);
    let tiny = |value: f64| if value.abs() < 1e-300 { 1e-300 } else { value };
    let mut below = 1.0 / tiny(1.0 - both * x / (one + 1.0));
    let (mut above, mut fraction) = (1.0, below);
    for step in 1..1000 {
        let step = f64::from(step);
        let at = one + 2.0 * step;
        let even = step * (other - step) * x / ((at - 1.0) * at);
        let odd = -(one + step) * (both + step) * x / (at * (at + 1.0));
        for part in [even, odd] {
            below = 1.0 / tiny(1.0 + part * below);
            above = tiny(1.0 + part / above);
            fraction *= below * above;
        }
        if (below * above - 1.0).abs() < 1e-14 {
            break;
        }
    }
    front.exp() * fraction / one
}

/// Logarithm of the gamma function (Stirling's series, after moving up to where it is exact).
fn ln_gamma(x: f64) -> f64 {
    let (mut x, mut product) = (x, 1.0);
    while x < 10.0 {
        product *= x;
        x += 1.0;
    }
    let (inverse, square) = (1.0 / x, 1.0 / (x * x));
    let series = inverse * (1.0 / 12.0 - square * (1.0 / 360.0 - square * (1.0 / 1260.0)));
    (x - 0.5) * x.ln() - x + 0.5 * std::f64::consts::TAU.ln() + series - product.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_happened_is_longer_than_anything() {
        let all = [Some(3), None, Some(1), Some(2), None];
        assert_eq!(quantile(&all, 0.5), Some(3));
        assert_eq!(quantile(&all, 0.6), Some(3));
        assert_eq!(quantile(&all, 0.95), None);
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(share_within(&all, 2), 0.4);
    }

    #[test]
    fn intervals_are_those_of_published_tables() {
        // R: binom.test(5, 100), binom.test(1, 10), binom.test(10, 10).
        for (hits, tries, lower, upper) in [
            (5, 100, 0.016_431_879, 0.112_834_91),
            (1, 10, 0.002_528_579, 0.445_016_1),
            (10, 10, 0.691_502_9, 1.0),
        ] {
            let (low, high) = confidence(hits, tries);
            assert!((low - lower).abs() < 1e-6, "{hits}/{tries}: {low}");
            assert!((high - upper).abs() < 1e-6, "{hits}/{tries}: {high}");
        }
    }

    #[test]
    fn a_rare_event_among_millions_has_the_limits_of_poisson() {
        // Exact Poisson limits of 3 events: 0.6187 to 8.7673.
        let (low, high) = confidence(3, 1_000_000);
        assert!((low * 1e6 - 0.6187).abs() < 0.001, "{low}");
        assert!((high * 1e6 - 8.7673).abs() < 0.001, "{high}");
    }

    #[test]
    fn none_seen_is_the_rule_of_three() {
        assert_eq!(confidence(0, 300), (0.0, 0.01));
        assert_eq!(confidence(0, 0), (0.0, 1.0));
    }
}
