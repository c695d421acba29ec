"""What training minimizes: the loss, and what its settings may not contradict."""
