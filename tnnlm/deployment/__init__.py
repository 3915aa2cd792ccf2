"""Deployment of a checkpoint as a converted folder, with measurements, a summary table and a model card."""
