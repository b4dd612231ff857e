"""From a labelled task and K examples a class to an adapted prompt, from it to labels, and to a comparison of methods.

`definition` (one YAML: data, fields, pattern, verbalizers) → `sampling` (the K-shot draw) → `encoding`
(rows to token ids) → `adapt` (many prompts at once) → `adapted` (a folder, and labels for new rows).
`method`, `suite` and their YAMLs say what is compared, and `plan` puts them together and checks them; `evaluate`
runs one method on one task (by `adapt`, `finetune` or `probe`), `comparison` says what the rows mean. Nothing here
knows Ray, so that a host without it can adapt and predict.
"""
