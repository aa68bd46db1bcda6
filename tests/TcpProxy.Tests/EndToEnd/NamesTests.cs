using System.Linq;
using System.Net;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class NamesTests : EndToEndTest
{
    [Fact(Timeout = Quick)]
    public async Task A_name_is_asked_for_when_it_is_needed_and_then_kept()
    {
        (Names names, Upstream upstream) = await OneServer();
        ProxyProcess proxy = await Given.Proxy(
            names.Launch, "127.0.0.1:0", $"server.example:{upstream.Port}", "--resolve", "1h");
        Assert.Equal(0, names.Asked);
        await Converse(proxy);
        int asked = names.Asked;
        Assert.True(asked > 0, "the name server was not asked");
        for (int i = 0; i < 10; i++)
        {
            await Converse(proxy);
        }

        Assert.Equal(asked, names.Asked);
    }

    [Fact(Timeout = Quick)]
    public async Task A_server_that_has_moved_is_found_when_its_address_fails()
    {
        (Names names, Upstream first) = await OneServer();
        ProxyProcess proxy = await Given.Proxy(
            names.Launch, "127.0.0.1:0", $"server.example:{first.Port}", "--resolve", "1h");
        proxy.Tolerate("resolve");
        await Converse(proxy);
        Upstream second = Given.Echo(new IPEndPoint(IPAddress.Parse("127.0.0.2"), first.Port));
        names.Answer(IPAddress.Parse("127.0.0.2"));
        await Converse(proxy); // the old one still answers: no reason to ask
        first.Dispose();
        await (await Given.Client(proxy)).ExpectReset();
        while (!await Finds(proxy, second))
        {
            await Wait.Pause(100);
        }

        LogLine resolved = await proxy.Line("resolve");
        Assert.Equal(("info", "server.example is 127.0.0.2"), (resolved.Level, resolved["message"]));
    }

    [Fact(Timeout = Quick)]
    public async Task What_an_administrator_said_of_a_server_holds_for_its_next_address_too()
    {
        (Names names, Upstream first) = await OneServer();
        string control = Given.Path("control");
        ProxyProcess proxy = await Given.Proxy(
            names.Launch, "--control", $"unix:{control}", "--resolve", "1s", "--retries", "0",
            "-l", "127.0.0.1:0", "--name", "web", "-u", $"server.example:{first.Port} name=app", "-u", "echo");
        proxy.Tolerate("resolve");
        await Converse(proxy);
        Given.Echo(new IPEndPoint(IPAddress.Parse("127.0.0.2"), first.Port));
        (await Tool.Proxy("--ctl", control, "set", "server", "web/app", "weight", "0")).Good();
        names.Answer(IPAddress.Parse("127.0.0.2"));
        while (!proxy.Lines.Any(line => line.Event == "resolve"))
        {
            await Converse(proxy);
            await Wait.Pause(100);
        }

        int before = proxy.Lines.Count(line => line.Event == "connection");
        for (int i = 0; i < 4; i++)
        {
            await Converse(proxy);
        }

        Assert.All((await proxy.LinesOf("connection", before + 4)).Skip(before), line => Assert.Equal("echo", line["upstream"]));
    }

    private async Task<(Names Names, Upstream Upstream)> OneServer()
    {
        Names names = await Names.Hosts(Given, "127.0.0.1 localhost");
        names.Answer(IPAddress.Loopback);
        return (names, Given.Echo());
    }

    private async Task Converse(ProxyProcess proxy)
    {
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
    }

    private async Task<bool> Finds(ProxyProcess proxy, Upstream upstream)
    {
        Peer client = await Given.Client(proxy);
        string address = client.Local;
        client.Finish();
        await client.Drain(10);
        return (await proxy.Connection(address))["server"] == upstream.Address;
    }
}
