"""The training program: ``deepspeed --module internvl_ds.train --cfg FILE``."""
