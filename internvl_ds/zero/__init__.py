"""DeepSpeed's insides: partitions, master weights, loss scales, hooks."""
