"""Image sets in the formats that people have them in."""
