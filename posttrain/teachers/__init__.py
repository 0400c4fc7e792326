"""Models that are asked for data: a server, a local model, or a recording of answers.

    asker = Asker(ServerTeacher(url, key=key), AnswerLog(run / "requests.jsonl"), Budget())
    for request, answer in asker.ask(requests):
        ...

Importing this loads nothing heavy; posttrain.teachers.local loads torch.
"""
