"""From a store of sentences to batches of meta-tasks.

    Store ──► types ──► builder ──► Examples ──► TaskBatch ──► micro-batches
    (domains)  (which    (a pure      (flat        (T tasks of   (rows of
               sentences, function of  arrays)      one step)     tensors)
               which      store, seed
               answer)    and index)

`formats` turns sentences into encoder inputs, `types` draws the self-supervised task types (the paper's five,
and sck) from a store's domains, `builder` makes the meta-task of a given index, `stream` has Ray Data make
those of a run, `batch` packs them, and `collate` lays out the micro-batches that `model.prompted` cuts.
"""
