"""Labelled sequences: ListOps by its generator, the tasks of the Long Range Arena from their archive."""
