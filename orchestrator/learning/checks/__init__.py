"""The exercises check themselves: a right formula, the known wrong ones, and which of them a learner's answer fits."""
