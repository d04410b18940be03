"""The trainers: the only room that knows `transformers.Trainer`.

`resumable` restores a run exactly, without the method; `publishing` writes cards and pushes; `trainer` adds the
method, with every hook in the order of a run. `arguments` are the options of both. What the hooks call: `recipe`
(mixed images, weight average), `backends` (DDP, FSDP2, compilation), `unsupported` (what is refused), `step_log`,
`console` and `trackers` (what a person sees).
"""
