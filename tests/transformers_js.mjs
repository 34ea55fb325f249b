// SPDX-License-Identifier: Apache-2.0
// Generates with an export in transformers.js. Reads and writes JSON; see run_node in test_transformers_js.py.
import { readFileSync } from 'node:fs';
import { AutoModelForSeq2SeqLM, TextStreamer, env, pipeline, Tensor } from '@huggingface/transformers';

const { root, name, batches = [], texts = [], options = {} } = JSON.parse(readFileSync(0, 'utf8'));
env.localModelPath = root;
env.allowRemoteModels = false;

const tensor = (rows) => new Tensor('int64', BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);
const answers = { ids: [], texts: [], streamed: '' };
if (batches.length) {
  const model = await AutoModelForSeq2SeqLM.from_pretrained(name, { dtype: 'auto' });
  for (const { input_ids, attention_mask } of batches) {
    const inputs = { inputs: tensor(input_ids), attention_mask: tensor(attention_mask) };
    const ids = await model.generate({ ...inputs, ...options });
    answers.ids.push(ids.tolist().map((row) => row.map(Number)));
  }
}
if (texts.length) {
  const pipe = await pipeline('text2text-generation', name, { dtype: 'auto' });
  answers.texts = (await pipe(texts, options)).map((answer) => answer.generated_text);
  const callback_function = (text) => { answers.streamed += text; };
  const streamer = new TextStreamer(pipe.tokenizer, { skip_special_tokens: true, callback_function });
  await pipe(texts[0], { ...options, streamer });
}
process.stdout.write(JSON.stringify(answers));
