"""The original's own models: InternViT-6B and CLIP's ViT under the heads of a probe."""
