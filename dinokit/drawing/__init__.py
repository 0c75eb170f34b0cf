"""Features as pictures for people: overlays, sheets, folders of drawings."""
