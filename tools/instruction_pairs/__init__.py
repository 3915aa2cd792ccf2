"""Generated instructions to write small Python functions, and a check of answers by running them."""
