"""The names that people already type, each a thin face over `blip2.Blip2`."""
