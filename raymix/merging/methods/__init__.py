"""Merge methods: functions of one parameter's task vectors, without files and without Ray.

Read in this order: `entrywise` (linear, task arithmetic, TIES, DARE, DELLA, Breadcrumbs) with
`order_statistics`, `spherical` (SLERP, Model Stock), `drm` (DRM and KnOTS) with `sign_election` and
`decompose`, `spectral` (TSV-M, Iso-C, Iso-CTS), `eigen` (LAPACK's symmetric eigensolver in steps).
"""
