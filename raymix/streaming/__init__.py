"""What runs while a model trains: who decides the mixture, and how tokens reach the workers.

```
controller  MixtureController   one actor: weights, leases, windows of statistics
  state, leases, windows, journal: its decisions and its files, without Ray
  client                        how a rank talks to it, or has one in its own process
plane       BlockPlane          one actor: keeps the blocks that come next in the object store
  cache, datasource             what it loads and drops; how Ray Data reads it
  source, plane_source          how a rank gets blocks, from files or from the plane
stream      MixtureStream       the worker's end: leases in, batches out
  feed, rows, documents, packed packed rows or whole documents from a plan
  ahead, lookahead, table, slab samples located, blocks wanted, blocks held
bucketer    LengthBucketer      one actor: which rank takes which documents, steps ahead
  bucketing                     its plans, made from lengths alone, without Ray
```

The rule that everything here keeps: what step t reads is a function of (seed, corpus, mixture
log). Who holds which block, which actor died and how many ranks there are changes when a batch is
ready, never what is in it.
"""
