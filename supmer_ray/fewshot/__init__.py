"""From a labelled task and K examples a class to an adapted prompt, and from it to labels.

`definition` (one YAML: data, fields, pattern, verbalizers) → `sampling` (the K-shot draw) → `encoding`
(rows to token ids) → `adapt` (many prompts at once) → `adapted` (a folder, and labels for new rows).
Torch only: nothing here knows Ray, so that a host without it can adapt and predict.
"""
