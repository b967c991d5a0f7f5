"""The merge methods: entrywise, spectral, spherical, DRM and what they share."""
