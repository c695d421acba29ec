"""Checkpoints: tags of ZeRO shards, saved whole or not at all."""
