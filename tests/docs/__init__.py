"""README, docs and the other pages: what they show runs, and what they name exists."""
