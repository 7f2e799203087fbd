//! Stretches of time that widen when there are too many of them.

/// As many as a plot can show.
const MAX: usize = 1500;
/// Seconds of the first ones.
const WIDTH: u64 = 15;

/// What is kept of a stretch of time.
pub(super) trait Bin: Copy + Default {
    /// Takes in the stretch that follows.
    fn merge(&mut self, later: Self);
}

/// Stretches of equal length, a bounded number of them: when there would be more, two become one.
#[derive(Debug)]
pub(super) struct Bins<T> {
    /// Number of the first one, counted from the epoch.
    first: u64,
    width: u64,
    all: Vec<T>,
}

impl<T> Default for Bins<T> {
    fn default() -> Self {
        Self {
            first: 0,
            width: WIDTH,
            all: Vec::new(),
        }
    }
}

impl<T: Bin> Bins<T> {
    /// Seconds of each.
    pub(super) const fn width(&self) -> u64 {
        self.width
    }

    /// Where a second is, counted from the epoch; what is before the first is in the first.
    pub(super) fn place(&self, second: u64) -> u64 {
        (second / self.width).max(self.first)
    }

    /// The stretch that a second is in.
    pub(super) fn at(&mut self, second: u64) -> &mut T {
        if self.all.is_empty() {
            self.first = second / self.width;
        }
        while self.place(second) - self.first >= MAX as u64 {
            self.widen();
        }
        let place = usize::try_from(self.place(second) - self.first).unwrap_or(0);
        if self.all.len() <= place {
            self.all.resize(place + 1, T::default());
        }
        &mut self.all[place]
    }

    fn widen(&mut self) {
        // Stretches begin at multiples of their length.
        let odd = usize::try_from(self.first % 2).unwrap_or(0);
        let mut wide = vec![T::default(); (self.all.len() + odd).div_ceil(2)];
        for (place, bin) in self.all.iter().enumerate() {
            wide[usize::midpoint(place, odd)].merge(*bin);
        }
        self.all = wide;
        self.first /= 2;
        self.width *= 2;
    }

    /// Each with the second at which it begins.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        let bins = self.all.iter().enumerate();
        bins.map(|(place, bin)| ((self.first + place as u64) * self.width, bin))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    struct Sum(u64);

    impl Bin for Sum {
        fn merge(&mut self, later: Self) {
            self.0 += later.0;
        }
    }

    #[test]
    fn nothing_is_lost_when_they_widen() {
        let mut bins = Bins::<Sum>::default();
        let start = 1_700_000_007;
        for second in (start..start + 1_000_000).step_by(7) {
            bins.at(second).0 += 1;
        }
        // Before the first, as lines in disorder are.
        bins.at(start - 86_400).0 += 1;
        assert_eq!(bins.width(), 960);
        assert!(bins.all.len() <= MAX);
        let (first, _) = bins.iter().next().unwrap();
        assert!(first <= start && start < first + 960, "{first}");
        let all: u64 = bins.iter().map(|(_, sum)| sum.0).sum();
        assert_eq!(all, 1_000_000_u64.div_ceil(7) + 1);
        // A leap of a thousand years.
        bins.at(start + 1000 * 365 * 86_400).0 += 1;
        assert!(bins.all.len() <= MAX);
    }
}
