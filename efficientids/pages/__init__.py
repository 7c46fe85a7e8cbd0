"""Static pages with plots: no network, no JavaScript, readable in light and dark."""
