"""From a store of sentences to batches of meta-tasks.

    Store ──► types ──► builder ──► Examples ──► TaskBatch ──► micro-batches
    (domains)  (which    (a pure      (flat        (T tasks of   (padded
               sentences, function of  arrays)      one step)     tensors)
               which      store, seed
               answer)    and index)

`formats` turns sentences into encoder inputs (three formats), `types` draws the five self-supervised
task types from a store's domains, `builder` makes the meta-task of a given index and streams them
through Ray Data, `batch` packs, pads and cuts.
"""
