"""Distributed pre-training of person re-identification backbones without labels."""
