"""Evaluation of models against a ground truth."""
