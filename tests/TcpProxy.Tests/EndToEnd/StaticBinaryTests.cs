using System;
using System.Buffers.Binary;
using System.Diagnostics;
using System.IO;
using System.Net;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class StaticBinaryTests : EndToEndTest
{
    [Fact(Timeout = Quick)]
    public void The_binary_asks_for_no_interpreter_and_no_library()
    {
        const uint Dynamic = 2;
        const uint Interpreter = 3;
        byte[] elf = File.ReadAllBytes(ProxyProcess.Binary);
        Assert.Equal([0x7F, (byte)'E', (byte)'L', (byte)'F', 2, 1], elf[..6]);
        ulong table = BinaryPrimitives.ReadUInt64LittleEndian(elf.AsSpan(32));
        int size = BinaryPrimitives.ReadUInt16LittleEndian(elf.AsSpan(54));
        int count = BinaryPrimitives.ReadUInt16LittleEndian(elf.AsSpan(56));
        for (int i = 0; i < count; i++)
        {
            ReadOnlySpan<byte> header = elf.AsSpan((int)table + (i * size), size);
            uint type = BinaryPrimitives.ReadUInt32LittleEndian(header);
            Assert.True(type != Interpreter, "the binary is dynamic: it names an interpreter");
            if (type == Dynamic)
            {
                Assert.False(NeedsLibrary(elf, header), "the binary is dynamic: it needs a library");
            }
        }
    }

    [Fact(Timeout = Quick)]
    public async Task In_an_empty_chroot_it_relays_to_a_name()
    {
        Tool.NeedRoot("chroot");
        string chroot = Tool.Need("chroot", "coreutils");
        string root = Directory.CreateDirectory(Given.Path("root")).FullName;
        Directory.CreateDirectory(Path.Combine(root, "etc"));
        File.WriteAllText(Path.Combine(root, "etc", "hosts"), "127.0.0.1 server.example\n");
        File.Copy(ProxyProcess.Binary, Path.Combine(root, "tcpproxy"));
        Upstream upstream = Given.Echo();
        Launch launch = new()
        {
            Before = [chroot, root],
            Binary = "/tcpproxy",
            PortFile = "/ports",
            Root = root,
        };
        ProxyProcess proxy = await Given.Proxy(launch, "127.0.0.1:0", $"server.example:{upstream.Port}");
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
        Assert.Equal(upstream.Address, (await proxy.Connection(client))["server"]);
    }

    [Fact(Timeout = Quick)]
    public async Task Nothing_connected_costs_little_memory()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "127.0.0.1:1");
        await proxy.Line("listening");
        Assert.True(proxy.Resident <= 4 << 20, $"{proxy.Resident} bytes resident");
    }

    [Fact(Timeout = Quick)]
    public async Task From_start_to_the_first_relayed_byte_it_takes_a_moment()
    {
        // the best of several tells what the program costs, the others what the machine was doing
        double best = double.MaxValue;
        Upstream upstream = Given.Echo();
        for (int i = 0; i < 10; i++)
        {
            int port = Given.FreePorts(1);
            Stopwatch clock = Stopwatch.StartNew();
            ProxyProcess proxy = await Given.Proxy(
                new Launch { AwaitReady = false }, $"127.0.0.1:{port}", upstream.Address);
            Peer? client = null;
            while (client is null)
            {
                try
                {
                    client = await Given.Client(new IPEndPoint(IPAddress.Loopback, port));
                }
                catch (System.Net.Sockets.SocketException) when (clock.ElapsedMilliseconds < 5_000)
                {
                    await Task.Yield();
                }
            }

            await client.Ask("x");
            best = Math.Min(best, clock.Elapsed.TotalMilliseconds);
            client.Dispose();
            await proxy.Stop();
        }

        TestContext.Current.TestOutputHelper?.WriteLine(
            $"{best:0.0} ms from the start to the first byte, fork and exec included");
        Assert.True(best < 40, $"{best:0.0} ms from the start to the first byte");
    }

    private static bool NeedsLibrary(byte[] elf, ReadOnlySpan<byte> header)
    {
        const ulong Needed = 1;
        int offset = (int)BinaryPrimitives.ReadUInt64LittleEndian(header[8..]);
        int size = (int)BinaryPrimitives.ReadUInt64LittleEndian(header[32..]);
        for (int at = offset; at < offset + size; at += 16)
        {
            if (BinaryPrimitives.ReadUInt64LittleEndian(elf.AsSpan(at)) == Needed)
            {
                return true;
            }
        }

        return false;
    }
}
