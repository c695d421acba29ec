"""One checkpoint on many data sets: ``internvl-ds evaluate``, and what its ranks run."""
