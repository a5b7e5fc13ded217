// OpenAI's client for Node: a response, a stream of one, and a call of a tool.
const OpenAI = require("openai");

async function main() {
  const client = new OpenAI({ baseURL: process.argv[2], apiKey: "any", maxRetries: 0 });
  const asked = { model: "any", input: "hello", max_output_tokens: 60 };
  const whole = await client.responses.create(asked);
  let streamed = "";
  for await (const event of await client.responses.create({ ...asked, stream: true })) {
    if (event.type === "response.output_text.delta") streamed += event.delta;
  }
  const parameters = {
    type: "object",
    properties: { n: { enum: [1, 2] }, ok: { type: "boolean" } },
    required: ["n", "ok"],
  };
  const called = await client.responses.create({
    ...asked,
    max_output_tokens: 120,
    tools: [{ type: "function", name: "pick", parameters, strict: true }],
    tool_choice: "required",
    parallel_tool_calls: false,
  });
  const call = called.output.find((item) => item.type === "function_call");
  console.log(JSON.stringify({ text: whole.output_text, streamed, called: JSON.parse(call.arguments) }));
}

main();
