"""One thing of each kind that can be added to the lab, and an episode from text to loss without a framework."""
