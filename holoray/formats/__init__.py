"""File formats that are not holoray's own."""
