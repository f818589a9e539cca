"""Statistics of measurements over pairs of rows: sums, figures, and intervals that know what pairs share."""
