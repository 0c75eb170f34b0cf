"""Any picture to pixels: files, formats, channels, preprocessing."""
