// The openai package and Vercel's AI SDK against a running server: node client.mjs BASE_URL. Prints {check: null or what went wrong} as JSON.
import assert from "node:assert/strict";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import OpenAI, { AuthenticationError, BadRequestError, NotFoundError } from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const baseURL = process.argv[2];
const client = new OpenAI({ baseURL, apiKey: "secret", maxRetries: 0 });
const model = createOpenAICompatible({ name: "jaxserve", baseURL, apiKey: "secret", includeUsage: true, supportsStructuredOutputs: true })("tiny");
const HELLO = "Hello! How can I help you?";
const hello = { model: "tiny", messages: [{ role: "user", content: "Hello" }] };
const ada = { model: "tiny", messages: [{ role: "user", content: "Who was Ada Lovelace?" }] };
const Person = z.object({ name: z.string(), age: z.number().int() });
const ADA = { name: "Ada Lovelace", age: 36 };
const getWeather = tool({
  description: "The weather of a place",
  inputSchema: z.object({ location: z.string() }),
  execute: async ({ location }) => `sunny in ${location}`,
});
const weather = { model, prompt: "What is the weather in San Francisco?", tools: { get_weather: getWeather }, stopWhen: stepCountIs(3), maxRetries: 0 };

const checks = {
  async models_are_listed_and_found_by_names_with_slashes() {
    const ids = [];
    for await (const one of client.models.list()) ids.push(one.id);
    assert.deepEqual(ids, ["tiny", "org/tiny"]);
    assert.equal((await client.models.retrieve("org/tiny")).id, "org/tiny");
  },
  async chat_answers_and_streams_the_same() {
    const whole = await client.chat.completions.create(hello);
    assert.equal(whole.choices[0].message.content, HELLO);
    let text = "";
    let usage;
    for await (const chunk of await client.chat.completions.create({ ...hello, stream: true, stream_options: { include_usage: true } })) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, HELLO);
    assert.deepEqual(usage, whole.usage);
  },
  async stream_helper_and_abort_work() {
    const runner = client.chat.completions.stream(hello);
    assert.equal(await runner.finalContent(), HELLO);
    const stream = await client.chat.completions.create({ ...hello, stream: true, max_tokens: 200, ignore_eos: true });
    for await (const _ of stream) break;
    assert.equal(stream.controller.signal.aborted, true);
  },
  async completions_take_token_ids() {
    const answer = await client.completions.create({ model: "tiny", prompt: [[5, 6], [7]], max_tokens: 3, logprobs: 1 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
    assert.equal(answer.choices[0].logprobs.tokens.length, 3);
  },
  async parse_fills_a_schema() {
    const parsed = await client.chat.completions.parse({ ...ada, response_format: zodResponseFormat(Person, "Person") });
    assert.deepEqual(parsed.choices[0].message.parsed, ADA);
    const tools = [zodFunction({ name: "Person", parameters: Person })];
    const called = await client.chat.completions.parse({ ...ada, tools, tool_choice: "required" });
    assert.deepEqual(called.choices[0].message.tool_calls[0].function.parsed_arguments, ADA);
  },
  async run_tools_goes_round() {
    const parameters = { type: "object", properties: { location: { type: "string" } }, required: ["location"] };
    const run = client.chat.completions.runTools({
      model: "tiny",
      messages: [{ role: "user", content: "What is the weather in San Francisco?" }],
      tools: [{ type: "function", function: { name: "get_weather", parameters, parse: JSON.parse, function: async () => "sunny" } }],
    });
    assert.equal(await run.finalContent(), "That is all that I wanted to know.");
  },
  async errors_are_of_the_clients_own_classes() {
    await assert.rejects(client.chat.completions.create({ ...hello, n: 999 }), (error) => error instanceof BadRequestError && error.param === "n");
    await assert.rejects(client.chat.completions.create({ ...hello, model: "not" }), NotFoundError);
    await assert.rejects(new OpenAI({ baseURL, apiKey: "x", maxRetries: 0 }).models.list(), AuthenticationError);
  },
  async ai_sdk_answers_and_streams_the_same() {
    const whole = await generateText({ model, prompt: "Hello", maxRetries: 0 });
    assert.equal(whole.text, HELLO);
    assert.equal(whole.finishReason, "stop");
    const stream = streamText({ model, prompt: "Hello", maxRetries: 0 });
    let text = "";
    for await (const piece of stream.textStream) text += piece;
    assert.equal(text, HELLO);
    assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
  },
  async ai_sdk_goes_round_with_tools() {
    for (const result of [await generateText(weather), streamText(weather)]) {
      assert.equal(await result.text, "That is all that I wanted to know.");
      const steps = await result.steps;
      assert.deepEqual(steps[0].toolCalls.map((call) => call.input), [{ location: "San Francisco, CA" }]);
    }
  },
  async ai_sdk_fills_a_schema() {
    const { output } = await generateText({ model, prompt: "Who was Ada Lovelace?", output: Output.object({ schema: Person }), maxRetries: 0 });
    assert.deepEqual(output, ADA);
  },
};

const results = {};
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    results[name] = null;
  } catch (error) {
    results[name] = String(error?.stack ?? error);
  }
}
console.log(JSON.stringify(results));
