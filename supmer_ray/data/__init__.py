"""From raw text to a store of sentences in domains.

    sources ──► sentences ──► embed ──► domains ──► store
    (documents)  (token ids)   (vectors)  (items by     (memory-mapped files
                                           cluster)      and a manifest)

`prepare` runs these steps over a Ray cluster; the modules themselves turn plain values into plain
values and can be read and tested without one. The result, a `Store`, is all that later stages see.
"""
