"""A map of photographs as one web page: layout, clusters, thumbnails, page."""
