"""One file per fine-tuning method, each a plug-in on one of the two cores."""
