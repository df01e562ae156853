"""What is measured about a model: whether its attentions agree (parity), and what they keep in memory."""
