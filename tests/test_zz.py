import torch
from test_contexts import setting, QUESTIONS
from calibrate.audit import contexts, situations, comprehension, preservation, own
from calibrate import models, corpora
from calibrate.corpora.situations import Passage, Crisis, load
def test_x(setting, tmp_path):
    c=setting.checkpoint; c.model.to(torch.bfloat16)
    def tr(f):
        try: f(); print("ok")
        except Exception as e: print("ERR", type(e).__name__, e)
    tr(lambda: contexts.read(c, setting.vectors, setting.twins[1:2], [], QUESTIONS, setting.dialogues, "calm"))
    tr(lambda: situations.read(c, setting.vectors, [situations.Text("a","chats","own",[{"role":"user","content":"hello there my friend"}])]))
    tr(lambda: comprehension.read(c, load(Passage)[:2], load(Crisis)[:2]))
    tr(lambda: preservation.read_neutral(c, setting.dialogues))
    stories=[s for s in corpora.load_stories() if s.split=="audit" and s.concept in ("desperate","calm")]
    tr(lambda: own.read(c, setting.vectors, stories, [], setting.dialogues, torch.zeros(0,2,3,32), "desperate", tmp_path))
    assert 0
