"""Other people's weights: which keys mean what, how files are opened, and how towers are filled."""
