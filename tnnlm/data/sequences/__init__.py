"""Labelled sequences for classification: a ListOps generator and the tasks of the Long Range Arena (LRA)."""
