"""What all tests share."""

import torch

# Tests run beside each other, one process for each core, and their models are small: threads that wait for one another
# would take most of the time.
torch.set_num_threads(1)
