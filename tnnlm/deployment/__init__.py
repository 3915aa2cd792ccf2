"""From a checkpoint to a converted folder, with its measurements, table and model card."""
