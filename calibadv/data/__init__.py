"""The questions of a run: files of questions, and the LightningDataModule over them."""
