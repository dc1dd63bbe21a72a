"""Images found by words or by another image, and images that are nearly the same."""

from blip2.search.index import Hit, ImageIndex, folder_index

__all__ = ["Hit", "ImageIndex", "folder_index"]
