using System.Diagnostics;
using System.Text;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class HalfCloseTests : EndToEndTest
{
    [Fact(Timeout = Quick)]
    public async Task The_client_can_finish_and_still_receive_an_answer_three_seconds_later()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await AnswerLate(client, server);
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("--", 8, 6), (line.End, line.BytesUp, line.BytesDown));
        Assert.InRange(line.Number("duration_ms"), 2_900, 10_000);
    }

    [Fact(Timeout = Quick)]
    public async Task The_server_can_finish_and_still_receive_an_answer_three_seconds_later()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await AnswerLate(server, client);
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("--", 6, 8), (line.End, line.BytesUp, line.BytesDown));
    }

    [Fact(Timeout = Quick)]
    public async Task A_megabyte_follows_after_the_other_side_has_finished()
    {
        const int Length = 5_000_000;
        Pattern pattern = new(5);
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address);
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        client.Finish();
        await server.ExpectEnd();
        Task sending = server.Send(pattern, Length);
        await client.Receive(pattern, Length);
        await sending;
        server.Finish();
        await client.ExpectEnd();
    }

    [Fact(Timeout = Quick)]
    public async Task A_server_that_never_answers_the_end_is_reset_after_the_fin_timeout()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--fin-timeout", "1s");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await client.Send("question");
        client.Finish();
        Stopwatch clock = Stopwatch.StartNew();
        Assert.Equal("question", Encoding.ASCII.GetString(await server.ReceiveToEnd()));
        await client.ExpectReset();
        await server.ExpectBroken();
        Assert.InRange(clock.ElapsedMilliseconds, 500, 6_000);
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("sD", "fin timeout"), (line.End, line.Reason));
    }

    [Fact(Timeout = Quick)]
    public async Task A_client_that_never_answers_the_end_is_reset_after_the_fin_timeout()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--fin-timeout", "1s");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        server.Finish();
        await client.ExpectEnd();
        await server.ExpectReset();
        await client.ExpectBroken();
        LogLine line = await proxy.Connection(client);
        Assert.Equal(("cD", "fin timeout"), (line.End, line.Reason));
    }

    [Fact(Timeout = Quick)]
    public async Task The_fin_timeout_counts_silence_not_the_whole_answer()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--fin-timeout", "2s");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        client.Finish();
        await server.ExpectEnd();
        for (int i = 0; i < 10; i++)
        {
            await Wait.Pause(500);
            await server.Send(".");
        }

        server.Finish();
        Assert.Equal("..........", Encoding.ASCII.GetString(await client.ReceiveToEnd()));
        Assert.Equal("--", (await proxy.Connection(client)).End);
    }

    [Fact(Timeout = Quick)]
    public async Task Without_fin_timeout_the_other_direction_goes_on()
    {
        Upstream upstream = Given.Server();
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--fin-timeout", "off");
        (Peer client, Peer server) = await Given.Bridge(proxy, upstream);
        await AnswerLate(client, server);
        Assert.Equal("--", (await proxy.Connection(client)).End);
    }

    private static async Task AnswerLate(Peer asks, Peer answers)
    {
        await asks.Send("question");
        asks.Finish();
        Assert.Equal("question", Encoding.ASCII.GetString(await answers.ReceiveToEnd()));
        await Wait.Pause(3_000);
        await answers.Send("answer");
        answers.Finish();
        Assert.Equal("answer", Encoding.ASCII.GetString(await asks.ReceiveToEnd()));
    }
}
