"""What was made once: the pair that ships, the pair of a study, and comparisons in docs/."""
